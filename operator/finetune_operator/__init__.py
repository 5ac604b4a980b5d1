"""The operator: what should happen next (``plan``, pure), and the shells that make it happen."""
