"""Where the rooms are introduced to one another: what a run reads, the run itself, and a trained model read back.

The commands and `condot.api` build on these: `open_inputs`, `build_run`, `TrainedModel`, `load_models`.
"""
