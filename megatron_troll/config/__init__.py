from megatron_troll.config.tree import Config
