"""The event loops: one file each, and the table that selects one."""
