{{- define "mlflow.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "mlflow.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mlflow.labels" -}}
{{ include "mlflow.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "mlflow.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "v%s-full" .Chart.AppVersion) }}
{{- end }}

{{- define "mlflow.destination" -}}
{{- $destination := required "artifacts.destination is required: the object store of the artefacts, such as s3://BUCKET/mlflow" .Values.artifacts.destination -}}
{{- if not (regexMatch "^[a-z0-9]+://[^/]" $destination) }}{{ fail (printf "artifacts.destination is '%s': give the URL of an object store, such as s3://BUCKET/mlflow; a folder is not shared by the replicas" $destination) }}{{ end -}}
{{- if hasPrefix "file:" $destination }}{{ fail "artifacts.destination is a folder, which is not shared by the replicas: give the URL of an object store, such as s3://BUCKET/mlflow" }}{{ end -}}
{{- $destination | trimSuffix "/" -}}
{{- end }}

{{- define "mlflow.backupDestination" -}}
{{- $destination := required "backup.destination is required: where backups go, such as s3://BUCKET/mlflow-backups (or set backup.enabled to false)" .Values.backup.destination -}}
{{- if hasPrefix (printf "%s/" (include "mlflow.destination" .)) (printf "%s/" $destination) }}{{ fail "backup.destination lies below artifacts.destination: backups cannot lie among the artefacts they are of" }}{{ end -}}
{{- $destination -}}
{{- end }}

{{/* Every name by which a client in the cluster or a forwarded port may call it. */}}
{{- define "mlflow.allowedHosts" -}}
{{- $service := include "mlflow.name" . -}}
{{- $names := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.cluster.local" $service .Release.Namespace) "localhost" "127.0.0.1" -}}
{{- $hosts := list -}}
{{- range concat $names .Values.allowedHosts }}{{ $hosts = concat $hosts (list . (printf "%s:*" .)) }}{{ end -}}
{{- join "," $hosts -}}
{{- end }}

{{- define "mlflow.databaseEnv" -}}
- name: MLFLOW_BACKEND_STORE_URI
  valueFrom:
    secretKeyRef:
      name: {{ required "database.secret is required: the name of an existing Secret with the URL of the PostgreSQL database" .Values.database.secret | quote }}
      key: {{ .Values.database.key | quote }}
- name: HOME
  value: /tmp
{{- end }}

{{- define "mlflow.env" -}}
{{ include "mlflow.databaseEnv" . }}
- name: MLFLOW_ARTIFACTS_DESTINATION
  value: {{ include "mlflow.destination" . | quote }}
{{- with .Values.artifacts.endpoint }}
- name: AWS_ENDPOINT_URL_S3
  value: {{ . | quote }}
{{- end }}
{{- with .Values.artifacts.region }}
- name: AWS_DEFAULT_REGION
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "mlflow.envFrom" -}}
{{- with .Values.artifacts.credentialsSecret }}
envFrom:
  - secretRef:
      name: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "mlflow.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end }}

{{- define "mlflow.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false  # of a service named mlflow they would set MLFLOW_PORT
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "mlflow.identity" -}}
{{- if not (or .Values.artifacts.credentialsSecret .Values.artifacts.serviceAccount) }}{{ fail "artifacts.credentialsSecret or artifacts.serviceAccount is required: an existing Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a service account that may use the bucket" }}{{ end -}}
{{- with .Values.artifacts.serviceAccount }}serviceAccountName: {{ . | quote }}{{ end -}}
{{- end }}
