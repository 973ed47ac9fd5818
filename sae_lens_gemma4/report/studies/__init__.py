"""What the page of each kind of study says and shows: one module a kind, each with a `page`."""
