"""Stage `rewrite`: weights cut to what a plan keeps, compensated or refitted, and saved as a checkpoint."""
