"""Stage `allocate`: rankings and a budget, or rates per layer, become a pruning plan. Pure."""
