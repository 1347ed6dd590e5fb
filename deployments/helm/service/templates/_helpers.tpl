{{- define "service.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "service.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "service.labels" -}}
{{ include "service.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "service.image" -}}
{{ required "image.repository is required: the image of a Bento, see the chart's README.md" .Values.image.repository }}:{{ required "image.tag is required: a version, so that every replica runs the same" .Values.image.tag }}
{{- end }}

{{- define "service.lake" -}}
{{- $url := required "lake.url is required: the object store of the artefacts, such as s3://BUCKET/lake" .Values.lake.url -}}
{{- if or (hasPrefix "file:" $url) (not (regexMatch "^[a-z0-9]+://[^/]" $url)) }}{{ fail (printf "lake.url is '%s': give the URL of an object store, such as s3://BUCKET/lake; a folder is not shared by the replicas" $url) }}{{ end -}}
{{- $url | trimSuffix "/" -}}
{{- end }}

{{/* Of a replica that is told to end: the pause, the drain, the longest request, 30 s in which its answer is read, 30 s to close. */}}
{{- define "service.graceSeconds" -}}
{{- add .Values.pauseSeconds .Values.drainSeconds .Values.requestSeconds 60 -}}
{{- end }}

{{- define "service.most" -}}
{{- if lt (int .Values.autoscaling.most) (int .Values.replicas) }}{{ fail (printf "autoscaling.most is %d, less than replicas, which is %d" (int .Values.autoscaling.most) (int .Values.replicas)) }}{{ end -}}
{{- .Values.autoscaling.most -}}
{{- end }}

{{/* What is refused at the door costs nothing: nobody without a key brings replicas. */}}
{{- define "service.query" -}}
{{- $pods := printf "namespace=%q,pod=~\"%s-[a-z0-9]+-[a-z0-9]+\"" .Release.Namespace (include "service.name" .) -}}
{{- .Values.autoscaling.query | default (printf "sum(rate(ft_requests_total{%s,outcome!~\"unauthorized|forbidden|rate_limited\"}[1m]))" $pods) -}}
{{- end }}

{{/* Many at once when it must be, one a minute when it may be: a replica that is gone takes minutes to come back. */}}
{{- define "service.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .Values.autoscaling.upAfterSeconds }}
  selectPolicy: Max
  policies:
    - {type: Percent, value: 100, periodSeconds: 60}
    - {type: Pods, value: 2, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.downAfterSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end }}
