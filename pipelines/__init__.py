"""The verbs, one file each: finetune, evaluate, predict, config."""
