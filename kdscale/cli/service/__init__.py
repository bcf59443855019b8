"""Commands of a service: `kdscale serve`, its tokens, and what clients ask of one."""
