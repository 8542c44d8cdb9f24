"""Everything that knows there is more than one device: the plan, the table of axes, and ZeRO."""
