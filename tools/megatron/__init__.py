"""Reading Megatron-LM launch scripts; used by tools/from_megatron_args.py."""
