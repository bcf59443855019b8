"""Stages that make the teacher that the others work with."""
