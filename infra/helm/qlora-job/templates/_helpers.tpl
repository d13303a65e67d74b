{{- /* Two lists of objects as one, in JSON: an object of `changes` takes the place of that with the same `key`. */ -}}
{{- define "qlora-job.merged" -}}
{{- $key := .key -}}
{{- $changed := dict -}}
{{- range .changes }}{{ $_ := set $changed (get . $key) true }}{{ end -}}
{{- $result := list -}}
{{- range .base }}{{ if not (hasKey $changed (get . $key)) }}{{ $result = append $result . }}{{ end }}{{ end -}}
{{- toJson (concat $result .changes) -}}
{{- end -}}

{{- /* The settings: the templates' own, then those of the values, as strings. */ -}}
{{- define "qlora-job.settings" -}}
{{- $data := dict -}}
{{- range $name, $value := .own }}{{ $_ := set $data $name $value }}{{ end -}}
{{- $_ := unset $data "JOB_RUN__OUTPUT" -}}
{{- $_ := unset $data "JOB_STORAGE__REGION" -}}
{{- if gt (int .values.nodes) 1 }}{{ $_ := set $data "JOB_RUN__NODES" (toString .values.nodes) }}{{ end -}}
{{- range $name, $value := .values.settings -}}
  {{- /* A number as JSON: toString would write 1500000 as 1.5e+06. */ -}}
  {{- $_ := set $data $name (ternary $value (toJson $value) (kindIs "string" $value)) -}}
{{- end -}}
{{- $_ := required "settings.JOB_RUN__OUTPUT: say where results go, such as s3://my-bucket/runs" (get $data "JOB_RUN__OUTPUT") -}}
{{- toJson $data -}}
{{- end -}}
