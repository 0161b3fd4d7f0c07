"""A run's configuration: its fields with defaults and checks, and the plan that follows from it."""

from vit_nabirds.config.fields import *  # noqa: F403
from vit_nabirds.config.fields import default as default
