"""SGLang servers over HTTP: what is asked, what comes back, who answers, and how weights get there."""
