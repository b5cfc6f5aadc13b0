"""What a plan costs on a machine: seconds by cause, memory with buffers, energy; and which layout is fastest."""
