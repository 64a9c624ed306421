"""Taking a tuned model elsewhere: merged weights (`merge`), its model card (`card`), the hub (`hub`)."""
