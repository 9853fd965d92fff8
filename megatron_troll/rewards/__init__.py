"""From the text of an answer to its reward: one verifier a file under verifiers/, plug-ins by import path."""
