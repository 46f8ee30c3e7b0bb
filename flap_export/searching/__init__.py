"""Stage `search`: pruning rates per layer, searched by a language model or by chance (Self-Pruner, 2502.14413)."""
