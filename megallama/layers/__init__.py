"""Building blocks: parameters in flat buffers, linear layers with their collectives, the loss."""
