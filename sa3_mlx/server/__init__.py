"""Keep models loaded and make sounds for whoever asks: engine, store, interfaces over HTTP, and the page."""
