"""What the patches of other repositories call, a module each; see patches/README.md.

They own how MTE enters a repository's own training loop: where its networks, heads, predictors and criteria are and how
it updates its teacher. They know nothing of how tokens are made, and the rest of the library knows nothing of them.
"""
