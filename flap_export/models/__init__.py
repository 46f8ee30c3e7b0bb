"""A model directory or hub name, dense or pruned: understood, read tensor by tensor, or loaded as a torch module."""
