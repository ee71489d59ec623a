"""Turn text into token ids."""
