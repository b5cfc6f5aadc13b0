"""Reading Megatron-LM launch scripts, for `megallama from-megatron`."""
