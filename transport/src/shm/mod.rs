//! Shared memory as a transport, for an appliance on the same host.
