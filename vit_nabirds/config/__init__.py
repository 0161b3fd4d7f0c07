"""A run's configuration: its fields with their defaults and checks, and the plan that follows from it."""

from vit_nabirds.config.fields import Config, default

__all__ = ["Config", "default"]
