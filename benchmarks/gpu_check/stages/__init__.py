"""The stages, one module each: ``run(context)`` measures and records, and leaves judging to ``summary``."""
