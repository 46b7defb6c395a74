"""The verbs bench, eval, verify, plan, recommend, watch and doctor."""
