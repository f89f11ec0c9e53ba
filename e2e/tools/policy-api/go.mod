// Nothing is built of it: its definition of ClusterNetworkPolicy is what the chart's object is held against.
module mayfly.dev/e2e/tools/policy-api

go 1.26.0

require sigs.k8s.io/network-policy-api v0.2.0
