"""The training program on `megatron.training`: `pretrain.run(argv)`. Importing this package imports no torch."""
