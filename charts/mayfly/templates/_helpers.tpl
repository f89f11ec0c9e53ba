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

{{/* What the broker and the controller read of the GitHub Apps: where the broker finds each key, and no key. */}}
{{- define "mayfly.githubApps" -}}
{{- range $n, $app := .Values.broker.githubApps }}
- clientId: {{ $app.clientId | quote }}
  {{- with $app.apiUrl }}
  apiUrl: {{ . | quote }}
  {{- end }}
  {{- with $app.keySecret }}
  keyFile: /etc/mayfly/github-apps/{{ $n }}/key.pem
  {{- end }}
  {{- with $app.vaultTransit }}
  vaultTransit:
    address: {{ .address | quote }}
    {{- with .mount }}
    mount: {{ . | quote }}
    {{- end }}
    key: {{ .key | quote }}
    tokenFile: /etc/mayfly/github-apps/{{ $n }}/token
  {{- end }}
{{- end }}
{{- end }}

{{- define "mayfly.auditEnv" -}}
{{- with .Values.audit.url }}
- {name: MAYFLY_AUDIT_URL, value: {{ . | quote }}}
{{- end }}
{{- if .Values.audit.caConfigMap }}
- {name: MAYFLY_AUDIT_CA_FILE, value: /etc/mayfly/audit-ca/ca.crt}
{{- end }}
{{- if .Values.audit.tokenSecret }}
- {name: MAYFLY_AUDIT_TOKEN_FILE, value: /etc/mayfly/audit-token/token}
{{- end }}
{{- end }}

{{- define "mayfly.auditMounts" -}}
{{- if .Values.audit.caConfigMap }}
- {name: audit-ca, mountPath: /etc/mayfly/audit-ca, readOnly: true}
{{- end }}
{{- if .Values.audit.tokenSecret }}
- {name: audit-token, mountPath: /etc/mayfly/audit-token, readOnly: true}
{{- end }}
{{- end }}

{{- define "mayfly.auditVolumes" -}}
{{- if .Values.audit.caConfigMap }}
- name: audit-ca
  configMap: {name: {{ .Values.audit.caConfigMap }}}
{{- end }}
{{- if .Values.audit.tokenSecret }}
- name: audit-token
  secret:
    secretName: {{ .Values.audit.tokenSecret }}
    defaultMode: 0440
    items:
      - {key: token, path: token}
{{- end }}
{{- end }}

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
