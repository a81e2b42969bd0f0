"""What a scenario names, built and wired: the engines of its loops, and what lies between them."""

from testbed.deployment.build import Engine, Place, build_engine, build_engines, build_loop, build_scheduler, places_of

__all__ = ["Engine", "Place", "build_engine", "build_engines", "build_loop", "build_scheduler", "places_of"]
