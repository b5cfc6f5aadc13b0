"""What a plan costs on a machine: seconds by cause, memory, energy; which layout is fastest."""
