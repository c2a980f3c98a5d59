"""Dense against sparse: layers, models and whole trainings, side by side in one run, as tables and as pictures."""

__all__: list[str] = []
