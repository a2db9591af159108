"""The verbs, one file each: finetune, plan, evaluate, predict, config, assets, tokenizer."""
