"""Tasks of reasoning-gym as prompts: a process makes them, reward workers judge answers to them."""
