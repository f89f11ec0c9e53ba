{{- define "mayfly.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "mayfly.selector" -}}
app.kubernetes.io/name: mayfly
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mayfly.labels" -}}
{{ include "mayfly.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: controller
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "mayfly.sentinelSelector" -}}
app.kubernetes.io/name: mayfly-sentinel
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mayfly.sentinelLabels" -}}
{{ include "mayfly.sentinelSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: sentinel
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* A name of its own: the gate's Service and the policies of runner pods select the controller by its. */}}
{{- define "mayfly.brokerSelector" -}}
app.kubernetes.io/name: mayfly-broker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mayfly.brokerLabels" -}}
{{ include "mayfly.brokerSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: broker
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "mayfly.pairs" -}}
{{- $pairs := list -}}
{{- range $key, $value := . -}}{{- $pairs = append $pairs (printf "%s=%s" $key $value) -}}{{- end -}}
{{- join "," $pairs -}}
{{- end -}}

{{/* Whether to apply an object of cluster scope: what was asked for, and the kind that it takes. */}}
{{- define "mayfly.applies" -}}
{{- if or (eq .asked "Always") (and (eq .asked "Auto") (.root.Capabilities.APIVersions.Has .kind)) -}}yes{{- end -}}
{{- end -}}
{{/* Whose tokens the broker believes: those that are named, and Mayfly's own where it is an issuer. */}}
{{- define "mayfly.issuers" -}}
{{- $issuers := .Values.broker.issuers }}
{{- with .Values.jobIdentity.issuer }}
{{- $own := dict "issuer" . "algorithms" (list "RS256") "maxAgeSeconds" 300 }}
{{- with $.Values.jobIdentity.certificateAuthorityFile }}
{{- $own = set $own "certificateAuthorityFile" . }}
{{- end }}
{{- $issuers = append $issuers $own }}
{{- end }}
{{- toYaml $issuers }}
{{- end }}
