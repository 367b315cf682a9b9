"""What a model costs on given GPUs, from arithmetic alone: no measurement, no torch. See docs/cost-model.md."""
