"""The verbs that are not recipes: doctor, explain, fetch, runs."""
