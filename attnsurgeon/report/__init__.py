"""Results as tables: the only place, beside the shell, that knows rich."""
