"""Text for calibration and evaluation: sources that users name, tokenizers, and windows of token ids."""
