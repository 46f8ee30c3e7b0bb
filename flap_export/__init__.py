"""flap_export."""
