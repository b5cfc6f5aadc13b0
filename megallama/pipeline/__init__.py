"""The interpreter of pipeline schedules."""
