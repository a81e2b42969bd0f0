"""Tables, figures, pages and traces of runs, whoever ran them."""
