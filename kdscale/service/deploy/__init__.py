"""Files to deploy with: a Dockerfile, a compose file, a systemd unit (docs/how-to/run-the-service.md)."""
