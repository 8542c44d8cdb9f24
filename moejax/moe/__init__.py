"""The sparse layer: route, dispatch, experts, combine; with what balances the load and what records it."""
