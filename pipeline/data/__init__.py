"""Published forms of data sets -> `VQAExample`s -> prompts, tokens and targets."""
