"""Raw archives as their owners publish them, with made-up anatomy: one builder per data set."""
