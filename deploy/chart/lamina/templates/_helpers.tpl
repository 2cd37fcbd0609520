{{- define "lamina.labels" -}}
app.kubernetes.io/name: laminad
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: lamina
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "lamina.selector" -}}
app.kubernetes.io/name: laminad
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "lamina.tlsSecret" -}}
{{ .Values.tls.secretName | default (printf "%s-tls" .Release.Name) }}
{{- end }}

{{- /* Under TLS the kubelet's gRPC probe is of no use: it speaks none. */ -}}
{{- define "lamina.probe" -}}
{{- if .Values.tls.enabled -}}
exec:
  command: [/opt/lamina/bin/lamina, --target, "unix:/run/lamina/laminad.sock", health]
{{- else -}}
grpc:
  port: {{ .Values.service.port }}
{{- end }}
{{- end }}

{{- define "lamina.issuer" -}}
{{- if .Values.tls.certManager.issuerRef -}}
{{ toYaml .Values.tls.certManager.issuerRef }}
{{- else -}}
kind: Issuer
name: {{ .Release.Name }}-ca
{{- end }}
{{- end }}
