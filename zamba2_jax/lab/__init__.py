"""From a question about models to an answer with error bars: many small runs, trained together and compared."""
