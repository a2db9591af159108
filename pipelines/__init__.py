"""The verbs, one file each: finetune, plan, evaluate, reproduce, predict, config, assets, tokenizer."""
