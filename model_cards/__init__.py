"""Model card templates, installed as `hf_guide.model_cards`."""
